"""The kernel: values that cross folders, exact math, the encoder, settings, errors, artifacts. Imports no stage."""
