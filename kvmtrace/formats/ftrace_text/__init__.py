"""ftrace's and trace-cmd's text: lines, patterns, fields."""
