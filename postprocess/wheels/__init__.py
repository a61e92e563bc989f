"""`python -m postprocess.wheels`: the wheels that Kaggle's image lacks, as one Kaggle dataset."""
