"""What is measured on the models of a run."""
