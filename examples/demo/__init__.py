"""The parts of finetune.py: data, models, training and the report."""
