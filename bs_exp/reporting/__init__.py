"""From records to a page: tables, figures and the comparison with the literature. Nothing is measured here."""
