"""What a task would take of a card, found before anything is loaded: a model of fake tensors runs the task's own code."""
