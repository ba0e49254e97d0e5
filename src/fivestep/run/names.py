"""The names of a run's files, for all that reads or writes them. Imports nothing."""

CONFIG, ENVIRONMENT, TOKENIZER, METRICS = "config.toml", "environment.json", "tokenizer.json", "metrics.jsonl"
SAVED = "checkpoints/step-*/manifest.json"  # its checkpoints
