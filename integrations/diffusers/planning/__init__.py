"""What a task would take of a card, before anything is loaded: the task's own code runs on a model of fake tensors."""
