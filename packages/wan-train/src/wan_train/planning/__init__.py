"""What a training run takes before it is started: memory, operations, communication, time, and a layout that fits.

Everything but `measured` and `verify` is arithmetic on a model's configuration and imports no torch.
"""
