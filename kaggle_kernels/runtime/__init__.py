"""What runs on Kaggle. A leaf: it imports nothing of this project but itself, so that `build` can put it into one file."""
