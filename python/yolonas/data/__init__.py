"""Labelled images: reading data sets, augmenting them, feeding them to training."""
