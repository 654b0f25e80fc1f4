"""Round a target's matrices to 4 bits by what they do to calibration texts, layer by layer."""
