"""What the programs share: flags, ranks, the run's folder, the optimiser's step, models that are asked, the demo."""
