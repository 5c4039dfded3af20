"""The verbs: retrofit, pretrain, calibrate, evaluate, export."""
