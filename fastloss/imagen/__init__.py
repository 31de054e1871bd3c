"""The reference text-to-image training system: model, data, training, tuning, sampling."""
