"""Which stored fragments are worth trying as bases: signatures, sketches, ranked candidates."""
