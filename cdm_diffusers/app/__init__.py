"""The web demo: `cdm app`. Gradio is imported when it starts, and by nothing else."""
