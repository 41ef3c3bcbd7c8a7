"""Where the method meets storage, Ray and MLflow: prepare, train, evaluate, inpaint. Depends on `tmad`, never back."""
