"""The three steps of FAS as scripts over small parts: arguments, data, metrics, trainers, evaluation."""
