//! Recipes from files, from the binary and from the command line.
//!
//! A recipe is read as a TOML table, laid over the recipe that it extends, and only then turned
//! into a [`Recipe`]. The default recipe, written as a table, is the schema: it knows every key and
//! the type of its value, so that a mistake is reported with the file and the full key.

use std::path::{Path, PathBuf};

use toml::{Table, Value};

use super::shapes::nearest;
use super::{Recipe, Recompute};
use crate::{Error, Result};

macro_rules! embedded {
    ($($name:literal),+ $(,)?) => {
        &[$(($name, include_str!(concat!("named/", $name, ".toml")))),+]
    };
}

/// Name and text of every recipe in the binary.
const EMBEDDED: &[(&str, &str)] = embedded![
    "digits",
    "photos",
    "navit-ti16",
    "navit-s16",
    "navit-b16",
    "navit-b32",
    "navit-l16",
    "navit-b16-contrastive",
    "captions",
    "vit-ti16",
    "vit-s16",
    "vit-b16",
    "vit-l16",
    "deit3-s16",
    "deit3-b16",
    "deit3-l16",
    "deit3-h14",
    "deit3-h52-14",
    "deit3-b16-ft224",
    "deit3-l16-ft224",
    "deit3-h14-ft224",
    "deit3-s16-ft384",
    "deit3-b16-ft384",
    "deit3-l16-ft384",
    "deit3-s16-21k",
    "deit3-b16-21k",
    "deit3-l16-21k",
    "deit3-h14-21k",
    "deit3-s16-21k-ft",
    "deit3-b16-21k-ft",
    "deit3-l16-21k-ft",
    "deit3-h14-21k-ft",
    "deit3-b16-transfer",
    "so400m14",
    "g14",
    "G14",
    "e14",
    "vit-22b",
    "vit-22b-b16",
    "vit-22b-l16",
];

/// Name and one-line description of every embedded recipe.
pub fn list() -> Vec<(&'static str, String)> {
    let description = |text: &str| {
        let table = text.parse::<Table>().ok()?;
        Some(table.get("description")?.as_str()?.to_owned())
    };
    EMBEDDED.iter().map(|(name, text)| (*name, description(text).unwrap_or_default())).collect()
}

impl Recipe {
    /// Reads the recipe file `name_or_path` (it ends in `.toml`) or the embedded recipe of that name,
    /// with everything that it extends, applies `sets` (`section.key=value`, where the value is TOML or a
    /// bare word) in order, and validates the result.
    ///
    /// # Errors
    /// One sentence that names the file or `--set`, the full key, what was expected and what was found.
    pub fn load(name_or_path: &str, sets: &[String]) -> Result<Self> {
        let mut table = schema()?;
        for (origin, layer) in layers(name_or_path)? {
            lay(&mut table, layer, &origin)?;
        }
        for set in sets {
            lay(&mut table, parse_set(set)?, &format!("--set {set}"))?;
        }
        let recipe: Self = table.try_into().map_err(Error::failure)?;
        recipe.validate()?;
        Ok(recipe)
    }

    /// Reads a resolved recipe, as [`Recipe::to_toml`] writes it into checkpoints; `file` is where it stands,
    /// for errors.
    ///
    /// # Errors
    /// As [`Recipe::load`].
    pub fn from_toml(text: &str, file: &Path) -> Result<Self> {
        let origin = file.display().to_string();
        let layer: Table = text.parse().map_err(|e| syntax(&origin, text, &e))?;
        let mut table = schema()?;
        lay(&mut table, layer, &origin)?;
        let recipe: Self = table.try_into().map_err(Error::failure)?;
        recipe.validate()?;
        Ok(recipe)
    }

    /// This recipe with `sets` (`section.key=value`) laid over it. The result is not validated.
    ///
    /// # Errors
    /// As [`Recipe::load`].
    pub fn with_sets(&self, sets: &[String]) -> Result<Self> {
        let mut table = Table::try_from(self).map_err(Error::failure)?;
        for set in sets {
            lay(&mut table, parse_set(set)?, &format!("--set {set}"))?;
        }
        table.try_into().map_err(Error::failure)
    }

    /// The recipe with every key, as TOML that [`Recipe::load`] reads back to the same.
    ///
    /// # Errors
    /// Never for a recipe that was loaded.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string(self).map_err(Error::failure)
    }
}

/// Every key with its default value.
fn schema() -> Result<Table> {
    Table::try_from(Recipe::default()).map_err(Error::failure)
}

/// The tables of a recipe and of all that it extends, the most general first, each with the name under
/// which its mistakes are reported.
fn layers(name_or_path: &str) -> Result<Vec<(String, Table)>> {
    let mut layers = Vec::new();
    let mut seen = Vec::new();
    let mut next = Some((name_or_path.to_owned(), PathBuf::new()));
    while let Some((name, folder)) = next.take() {
        let (origin, text, folder) = read(&name, &folder, seen.last())?;
        if seen.contains(&origin) {
            seen.push(origin);
            return Err(Error::usage(format!(
                "recipes extend each other in a circle: {}",
                seen.join(" extends ")
            )));
        }
        let mut table: Table = text.parse().map_err(|e| syntax(&origin, &text, &e))?;
        match table.remove("extends") {
            None => {}
            Some(Value::String(parent)) => next = Some((parent, folder)),
            Some(other) => {
                return Err(Error::usage(format!(
                    "{origin}: `extends` must be the name or path of one recipe, but it is {}",
                    describe(&other)
                )));
            }
        }
        seen.push(origin.clone());
        layers.push((origin, table));
    }
    layers.reverse();
    Ok(layers)
}

/// Text of a recipe: its name in messages, the text, and the folder that its own `extends` starts from.
fn read(name: &str, folder: &Path, child: Option<&String>) -> Result<(String, String, PathBuf)> {
    if name.ends_with(".toml") {
        let path = folder.join(name);
        let text = std::fs::read_to_string(&path).map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => Error::file(&path, "there is no such recipe file"),
            _ => Error::file(&path, format!("the recipe cannot be read: {e}")),
        })?;
        let folder = path.parent().unwrap_or(Path::new("")).to_owned();
        return Ok((path.display().to_string(), text, folder));
    }
    let found = EMBEDDED.iter().find(|(known, _)| *known == name);
    let (_, text) = found.ok_or_else(|| {
        let by = child.map_or(String::new(), |c| format!("{c}: `extends`: "));
        let hint = nearest(name, EMBEDDED.iter().map(|(known, _)| *known))
            .map_or(String::new(), |n| format!(" (did you mean `{n}`?)"));
        Error::usage(format!(
            "{by}there is no recipe `{name}`{hint}; `trencadis recipes` lists them, and the path of a recipe file \
             ends in .toml"
        ))
    })?;
    Ok((format!("recipe `{name}`"), (*text).to_owned(), PathBuf::new()))
}

fn syntax(origin: &str, text: &str, error: &toml::de::Error) -> Error {
    let line = error.span().map_or(1, |span| text[..span.start.min(text.len())].matches('\n').count() + 1);
    Error::usage(format!("{origin}: line {line} is not valid TOML: {}", error.message().replace('\n', ", ")))
}

/// `section.key=value` as a table of one leaf.
fn parse_set(set: &str) -> Result<Table> {
    let Some((key, text)) = set.split_once('=') else {
        return Err(Error::usage(format!(
            "--set {set}: expected section.key=value, for example train.lr=3e-4"
        )));
    };
    let (key, text) = (key.trim(), text.trim());
    let parsed = format!("value = {text}").parse::<Table>().ok().and_then(|mut t| t.remove("value"));
    let wants_text = matches!(lookup(&schema()?, key), Some(Value::String(_)));
    let value = match parsed {
        Some(value) if value.is_str() || !wants_text => value,
        _ => Value::String(text.to_owned()),
    };
    let nested = key.rsplit('.').fold(value, |inner, part| {
        let mut table = Table::new();
        table.insert(part.to_owned(), inner);
        Value::Table(table)
    });
    match nested {
        Value::Table(table) => Ok(table),
        _ => Err(Error::usage(format!("--set {set}: the key is missing"))),
    }
}

fn lookup<'a>(table: &'a Table, key: &str) -> Option<&'a Value> {
    match key.split_once('.') {
        None => table.get(key),
        Some((section, rest)) => lookup(table.get(section)?.as_table()?, rest),
    }
}

/// Lays `layer` over `base`, which holds every known key; keys of earlier versions are taken as what they meant.
fn lay(base: &mut Table, mut layer: Table, origin: &str) -> Result<()> {
    renamed(&mut layer);
    overlay(base, &layer, origin, "")
}

/// `model.checkpoint`, which every run of earlier versions has in its recipe, is `model.recompute` now.
fn renamed(layer: &mut Table) {
    let Some(Value::Table(model)) = layer.get_mut("model") else { return };
    if let Some(&Value::Boolean(whole)) = model.get("checkpoint")
        && !model.contains_key("recompute")
    {
        model.remove("checkpoint");
        let recompute = if whole { Recompute::Full } else { Recompute::None };
        model.insert("recompute".into(), recompute.name().into());
    }
}

fn overlay(base: &mut Table, layer: &Table, origin: &str, prefix: &str) -> Result<()> {
    for (name, value) in layer {
        let key = format!("{prefix}{name}");
        let Some(slot) = base.get_mut(name) else {
            return Err(unknown_key(&key, origin)?);
        };
        match (slot, value) {
            (Value::Table(inner), Value::Table(given)) => overlay(inner, given, origin, &format!("{key}."))?,
            (slot, value) => {
                if !same_type(slot, value) {
                    return Err(Error::usage(format!(
                        "{origin}: `{key}` must be {}, but it is {}",
                        expected(slot),
                        describe(value)
                    )));
                }
                check_value(&key, value, origin)?;
                *slot = value.clone();
            }
        }
    }
    Ok(())
}

/// Whether the default recipe with this one value is a recipe: catches unknown names of choices, negative
/// counts and wrong elements of lists.
fn check_value(key: &str, value: &Value, origin: &str) -> Result<()> {
    let mut probe = schema()?;
    let (section, leaf) = key.rsplit_once('.').unwrap_or(("", key));
    let mut table = &mut probe;
    for part in section.split('.').filter(|part| !part.is_empty()) {
        match table.get_mut(part) {
            Some(Value::Table(inner)) => table = inner,
            _ => return Ok(()),
        }
    }
    table.insert(leaf.to_owned(), value.clone());
    let Err(error) = probe.try_into::<Recipe>() else { return Ok(()) };
    let message = error.message();
    if message.starts_with("unknown variant") {
        let names: Vec<&str> = message.split('`').skip(3).step_by(2).collect();
        let given = value.as_str().unwrap_or_default();
        let hint = nearest(given, names.iter().copied())
            .map_or(String::new(), |n| format!(" (did you mean \"{n}\"?)"));
        return Err(Error::usage(format!(
            "{origin}: `{key}` must be one of {}, but it is \"{given}\"{hint}",
            names.join(", ")
        )));
    }
    if let Value::Integer(negative @ ..0) = value {
        return Err(Error::usage(format!("{origin}: `{key}` must be at least 0, but it is {negative}")));
    }
    Err(Error::usage(format!("{origin}: `{key}` = {value} does not fit: {message}")))
}

fn unknown_key(key: &str, origin: &str) -> Result<Error> {
    let schema = schema()?;
    let mut known = Vec::new();
    collect(&schema, "", &mut known);
    let leaf = key.rsplit('.').next().unwrap_or(key);
    let same_leaf = known.iter().find(|k| k.rsplit('.').next() == Some(leaf));
    let hint = same_leaf
        .map(String::as_str)
        .or_else(|| {
            // Within the section first: `train.lrr` is `train.lr`, not whatever is shorter elsewhere.
            let section = key.strip_suffix(leaf).unwrap_or_default();
            let siblings =
                known.iter().filter_map(|k| k.strip_prefix(section)).filter(|rest| !rest.contains('.'));
            let near = nearest(leaf, siblings)?;
            known.iter().map(String::as_str).find(|k| k.strip_prefix(section) == Some(near))
        })
        .or_else(|| nearest(key, known.iter().map(String::as_str)));
    let hint = hint.map_or(String::new(), |k| format!("; did you mean `{k}`?"));
    Ok(Error::usage(format!("{origin}: there is no key `{key}`{hint}")))
}

/// Every key of `table`, dotted, sections included.
fn collect(table: &Table, prefix: &str, into: &mut Vec<String>) {
    for (name, value) in table {
        let key = format!("{prefix}{name}");
        if let Value::Table(inner) = value {
            collect(inner, &format!("{key}."), into);
        }
        into.push(key);
    }
}

fn same_type(slot: &Value, value: &Value) -> bool {
    // A whole number is a fine value of a real one.
    slot.same_type(value) || matches!((slot, value), (Value::Float(_), Value::Integer(_)))
}

fn expected(slot: &Value) -> &'static str {
    match slot {
        Value::String(_) => "a string",
        Value::Integer(_) => "an integer",
        Value::Float(_) => "a number",
        Value::Boolean(_) => "true or false",
        Value::Array(_) => "a list such as [0.5]",
        Value::Table(_) => "a section of keys",
        Value::Datetime(_) => "a date",
    }
}

fn describe(value: &Value) -> String {
    match value {
        Value::Table(_) => "a section of keys".into(),
        Value::String(text) => format!("the string \"{text}\""),
        other => format!("the {} {other}", other.type_str()),
    }
}
