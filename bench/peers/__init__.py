"""The same tiny model and data through ms-swift, transformers and this project, side by side."""
