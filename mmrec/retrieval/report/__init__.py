"""What an evaluation is shown as: HTML pages that hold all they need, and one picture for a README."""
