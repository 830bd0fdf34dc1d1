"""What surrounds the two algorithms: flags, ranks, a run's folder, one step, asking models, figures."""
