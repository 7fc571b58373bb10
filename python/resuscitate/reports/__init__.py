"""What a user reads afterwards: reports, maps, plots and the HTML page."""
