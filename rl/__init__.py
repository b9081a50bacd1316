"""Reinforcement learning: rollouts, advantages, loss, learner, evaluation and the report."""
