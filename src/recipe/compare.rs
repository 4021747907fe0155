//! In what two recipes differ.

use toml::{Table, Value};

/// "key is A there and B here" for every key of both tables, `except` for those of some names; `path` stands before each
/// key.
pub(crate) fn differences(path: &str, there: &Table, here: &Table, except: &[&str]) -> Vec<String> {
    let mut found = Vec::new();
    for (key, there) in there.iter().filter(|(key, _)| !except.contains(&key.as_str())) {
        match (there, here.get(key)) {
            (Value::Table(there), Some(Value::Table(here))) => {
                found.extend(differences(&format!("{path}{key}."), there, here, except));
            }
            (there, Some(here)) if there != here => {
                found.push(format!("{path}{key} is {there} there and {here} here"));
            }
            _ => {}
        }
    }
    found
}
