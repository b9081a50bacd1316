"""Supervised fine-tuning: rendering, teacher, trajectories, dataset and training."""
