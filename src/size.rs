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
}
