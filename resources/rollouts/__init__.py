"""Rollouts in the world: their store, executor, watchdog, readings of both arms, and targets."""
