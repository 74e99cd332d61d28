"""Held-out prediction: splits, scores, simple methods to compare with, and calibration."""
