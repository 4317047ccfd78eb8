"""What the model is, eats and costs. Imports nothing of train/, serve/ or eval/."""
