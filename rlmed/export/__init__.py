"""Export a run's model as a Hugging Face folder that serves the questions it was trained on."""
