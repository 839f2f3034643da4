"""The engine in process: transformers models behind ragged key-value caches."""
