"""What related work does in training: regularizers, optimizers and callbacks. None of it is initialisation."""
