"""Assets: uploaded and generated files, and what keeps them and the database consistent."""
