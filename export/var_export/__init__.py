"""Checkpoint → bundle, and the proof that nothing changed on the way."""
