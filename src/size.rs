//! Sizes of memory as settings and jobs write them.

use crate::error::{Error, Result};

/// The bytes of a size such as `2GiB`, `512 MiB`, `1.5GB` or a bare number; an error naming `field` where it is none.
pub fn bytes(text: &str, field: &str) -> Result<usize> {
    let text = text.trim();
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let factor = match unit.trim() {
        "" | "B" => 1.0,
        "KiB" => 1024.0,
        "MiB" => 1024f64.powi(2),
        "GiB" => 1024f64.powi(3),
        "TiB" => 1024f64.powi(4),
        "kB" | "KB" => 1e3,
        "MB" => 1e6,
        "GB" => 1e9,
        "TB" => 1e12,
        _ => f64::NAN,
    };
    let value = number.parse::<f64>().unwrap_or(f64::NAN) * factor;
    if value.is_finite() {
        return Ok(value as usize);
    }
    Err(Error::invalid(field, format!("`{text}` is not a size; write it like \"2GiB\" or \"512MiB\"")))
}

/// The bytes of a size as [`bytes()`] reads it, or of a share of `total` such as `90%`.
pub fn bytes_of(text: &str, total: u64, field: &str) -> Result<usize> {
    let Some(percent) = text.trim().strip_suffix('%') else { return bytes(text, field) };
    match percent.trim().parse::<f64>() {
        Ok(percent) if percent > 0.0 && percent <= 100.0 => Ok((total as f64 * percent / 100.0) as usize),
        _ => Err(Error::invalid(field, format!("`{text}` is not a share; write it like \"90%\""))),
    }
}

/// A size for people to read, e.g. `1.5 GiB`.
pub fn show(bytes: usize) -> String {
    let mut value = bytes as f64;
    let mut units = ["B", "KiB", "MiB", "GiB", "TiB"].into_iter();
    let mut unit = units.next().unwrap_or_default();
    for larger in units {
        // What would be rounded to 1024 is shown as one of the next.
        if value < 1023.95 {
            break;
        }
        (value, unit) = (value / 1024.0, larger);
    }
    if unit == "B" { format!("{bytes} B") } else { format!("{value:.1} {unit}") }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (text, size) in
            [("2GiB", 2 << 30), (" 1.5 KiB ", 1536), ("2GB", 2_000_000_000), ("3MB", 3_000_000), ("77", 77), ("0", 0)]
        {
            assert_eq!(bytes(text, "f").unwrap(), size, "{text}");
        }
        for bad in ["", "GiB", "-1GiB", "2 gigs", "1 gibi", "1.2.3MB", "1e9"] {
            assert_eq!(bytes(bad, "kv_cache.memory").unwrap_err().param.as_deref(), Some("kv_cache.memory"), "{bad}");
        }
    }

    #[test]
    fn shares() {
        assert_eq!(bytes_of("25%", 4000, "f").unwrap(), 1000);
        assert_eq!(bytes_of("100 %", 4000, "f").unwrap(), 4000);
        assert_eq!(bytes_of("1KiB", 4000, "f").unwrap(), 1024);
        for bad in ["0%", "101%", "%", "-5%", "some%"] {
            assert_eq!(
                bytes_of(bad, 4000, "device.memory").unwrap_err().param.as_deref(),
                Some("device.memory"),
                "{bad}"
            );
        }
    }

    #[test]
    fn sizes_are_shown_as_they_are_read() {
        for (size, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (1536, "1.5 KiB"),
            ((1 << 20) - 1, "1.0 MiB"),
            (2 << 30, "2.0 GiB"),
            (3 << 42, "12.0 TiB"),
        ] {
            assert_eq!(show(size), text);
        }
    }
}
