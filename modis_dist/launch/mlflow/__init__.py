"""MLflow: a study's runs, told apart from the study, and their pages."""
