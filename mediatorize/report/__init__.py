"""What is written for people: model cards, pictures, reports."""
