"""Steps for other tools' pipelines. Each module needs the package it is named after; nothing else imports them."""
