"""A small language model: its architecture, data, training loop and report. Used by the training examples."""
