"""How a fragment is stored: element planes, entropy coding, predictors. Pure, bytes to bytes."""
