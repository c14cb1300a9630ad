"""Constitutional AI on Ray: constitution and helpful model in, harmless policy out."""
