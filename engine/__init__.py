"""What surrounds any run: settings, processes, stopping, files. It knows neither data nor method."""
