"""What arranges the instruments of `cdm_diffusers.evaluation`: searches, and the paper's experiments."""
