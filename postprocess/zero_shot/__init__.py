"""A base model that is used as it is, without training: its run folder and the measure of its position bias."""
