"""The whole path on one machine, with photographs that ship inside scikit-image and scikit-learn."""
