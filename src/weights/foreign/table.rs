//! The tables of foreign names: one text file a family of networks in `tables/`.
//!
//! A line of a table says which tensor is which, `THEIRS [axes] = OURS [axes]`; [`axes`](super::axes) explains the
//! letters, `{n}` is the number of a block, and axes that are left out are those of the other side. Several tensors
//! that are one tensor on the other side are joined by ` + `, along the axis that is a sum there; `A = B & C` makes B and
//! C copies of A. A name that ends in `?` is optional, one that ends in `?word` is there if any tensor with that word is.
//!
//! | line | meaning |
//! |---|---|
//! | `linear A [o d] = B` | `A.weight = B.weight`, perhaps `A.bias [o] = B.bias` |
//! | `norm A [d] = B` | `A.weight = B.gain`, perhaps `A.bias = B.bias` |
//! | `gamma A [d] = B` | `A.gamma = B.gain`, perhaps `A.beta`, all zeros |
//! | `dense A [d o] = B [o d]` | `A/kernel = B.weight`, perhaps `A/bias [o] = B.bias` |
//! | `scale A [d] = B` | `A/scale = B.gain`, perhaps `A/bias = B.bias` |
//! | `ignore P` | tensors that a forward pass does not use; `P` may end in `*` |
//! | `refuse P: why` | tensors of a variant that this crate's model is not |
//! | `name`, `within` | what the family is called; what may stand before all names |
//! | `set key=value` | what the implementation does and no file tells |
//! | `usual key=value` | the same, where a recipe or a named architecture may say otherwise |
//! | `make sincos` | the position table is computed: fixed sines and cosines |
//! | `include T` | the lines of table `T` |

use std::sync::LazyLock;

use super::axes::Axes;
use crate::{Error, Result};

macro_rules! embedded {
    ($($name:literal),+ $(,)?) => {
        &[$(($name, include_str!(concat!("tables/", $name, ".txt")))),+]
    };
}

/// Every table, parts that others include (without a `name`) too. Where two fit a file alike, the first is taken.
const TABLES: &[(&str, &str)] = embedded![
    "timm-vit",
    "timm-vit-parallel",
    "timm-vit-parallel-fused",
    "timm-naflex",
    "deit",
    "dinov2",
    "dinov2-registers",
    "hf-vit",
    "hf-dinov2",
    "hf-dinov2-registers",
    "hf-siglip",
    "hf-siglip-classifier",
    "hf-siglip2-naflex",
    "vit-pytorch-vit",
    "vit-pytorch-simple-vit",
    "vit-pytorch-na-vit",
    "vit-pytorch-na-vit-nested",
    "big-vision",
    "big-vision-naflex",
    "vit-jax",
    "part-timm-embed",
    "part-timm-block",
    "part-timm-end",
    "part-hf-attention",
    "part-dinov2",
    "part-hf-dinov2",
    "part-hf-siglip",
    "part-hf-siglip-head",
    "part-flax-end",
];

/// One tensor on one side of a rule.
#[derive(Clone, Debug)]
pub(super) struct Side {
    /// Its name with `{n}`.
    pub pattern: String,
    pub axes: Axes,
    /// The word of its optional group; its own name where it stands alone.
    pub group: Option<String>,
}

/// Tensors that are each other: one on at least one of the sides.
#[derive(Clone, Debug)]
pub(super) struct Rule {
    pub theirs: Vec<Side>,
    /// None for buffers of zeros.
    pub ours: Vec<Side>,
    /// Whether ours are all the same as theirs.
    pub copies: bool,
}

/// What is known of an implementation.
#[derive(Clone, Debug, Default)]
pub(super) struct Family {
    /// Name of the table.
    pub key: &'static str,
    /// Name in messages; empty for a part of other tables.
    pub name: String,
    /// What may stand before all names.
    pub within: Vec<String>,
    pub rules: Vec<Rule>,
    pub ignored: Vec<String>,
    /// Pattern and sentence.
    pub refused: Vec<(String, String)>,
    pub set: Vec<String>,
    pub usual: Vec<String>,
    /// Whether positions are sines and cosines that no file holds.
    pub sincos: bool,
}

/// All families.
///
/// # Errors
/// Never; a test reads all tables.
pub(super) fn families() -> Result<&'static [Family]> {
    static FAMILIES: LazyLock<Result<Vec<Family>, String>> = LazyLock::new(|| {
        let named = TABLES.iter().filter(|(key, _)| !key.starts_with("part-"));
        named.map(|(key, _)| read(key)).collect()
    });
    FAMILIES.as_deref().map_err(Error::failure)
}

/// The family of a table.
pub(super) fn family(key: &str) -> Result<&'static Family> {
    let found = families()?.iter().find(|family| family.key == key);
    found.ok_or_else(|| Error::failure(format_args!("there is no table {key}")))
}

/// The number of the block if `name` is one of `pattern`; 0 where it has none.
pub(super) fn matches(pattern: &str, name: &str) -> Option<Option<usize>> {
    if let Some(start) = pattern.strip_suffix('*') {
        return match start.split_once("{n}") {
            None => name.starts_with(start).then_some(None),
            Some((before, after)) => {
                let rest = name.strip_prefix(before)?;
                let digits = rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_digit()).len();
                let (number, rest) = rest.split_at(digits);
                rest.starts_with(after).then(|| number.parse().ok()).flatten().map(Some)
            }
        };
    }
    match pattern.split_once("{n}") {
        None => (pattern == name).then_some(None),
        Some((before, after)) => {
            let number = name.strip_prefix(before)?.strip_suffix(after)?;
            let plain = number == "0" || !number.starts_with('0');
            (plain && number.bytes().all(|b| b.is_ascii_digit()))
                .then(|| number.parse().ok())
                .flatten()
                .map(Some)
        }
    }
}

/// A pattern with its number.
pub(super) fn fill(pattern: &str, layer: Option<usize>) -> String {
    layer.map_or_else(|| pattern.to_owned(), |n| pattern.replace("{n}", &n.to_string()))
}

fn read(key: &'static str) -> Result<Family, String> {
    let mut family = Family { key, ..Family::default() };
    add(&mut family, key)?;
    match family.name.is_empty() {
        true => Err(format!("table {key} has no name")),
        false => Ok(family),
    }
}

fn add(family: &mut Family, key: &str) -> Result<(), String> {
    let (_, text) =
        TABLES.iter().find(|(known, _)| *known == key).ok_or(format!("there is no table {key}"))?;
    for (number, line) in text.lines().enumerate() {
        let line = line.split('#').next().unwrap_or_default().trim();
        if !line.is_empty() {
            add_line(family, line).map_err(|cause| format!("table {key}, line {}: {cause}", number + 1))?;
        }
    }
    Ok(())
}

fn add_line(family: &mut Family, line: &str) -> Result<(), String> {
    let (word, rest) = line.split_once(' ').ok_or("one word alone")?;
    let rest = rest.trim();
    match word {
        "name" => family.name = rest.into(),
        "within" => family.within.push(rest.into()),
        "set" => family.set.push(rest.into()),
        "usual" => family.usual.push(rest.into()),
        "ignore" => family.ignored.push(rest.into()),
        "make" => family.sincos = rest == "sincos",
        "include" => add(family, rest)?,
        "refuse" => {
            let (pattern, why) = rest.split_once(": ").ok_or("no reason")?;
            family.refused.push((pattern.into(), why.into()));
        }
        "linear" | "norm" | "gamma" | "dense" | "scale" => {
            let (theirs, ours, copies) = sides(rest)?;
            family.rules.extend(modules(word, theirs, ours, copies));
        }
        _ => {
            let (theirs, ours, copies) = sides(line)?;
            family.rules.push(Rule { theirs, ours, copies });
        }
    }
    Ok(())
}

/// The rules of a module's two tensors.
fn modules(kind: &str, theirs: Vec<Side>, ours: Vec<Side>, copies: bool) -> Vec<Rule> {
    let (weight, bias) = match kind {
        "gamma" => (".gamma", ".beta"),
        "dense" => ("/kernel", "/bias"),
        "scale" => ("/scale", "/bias"),
        _ => (".weight", ".bias"),
    };
    let gain = if matches!(kind, "linear" | "dense") { ".weight" } else { ".gain" };
    let with = |sides: &[Side], leaf: &str, axes: &dyn Fn(&Axes) -> Axes, group: Option<&str>| -> Vec<Side> {
        let side = |side: &Side| Side {
            pattern: format!("{}{leaf}", side.pattern),
            axes: axes(&side.axes),
            group: group.map(str::to_owned).or_else(|| side.group.clone()),
        };
        sides.iter().map(side).collect()
    };
    let all = |axes: &Axes| axes.clone();
    // The biases of a rule are there together or not at all.
    let group = format!("{}{bias}", theirs[0].pattern);
    let beside = |axes: &Axes| if kind == "dense" { axes.last() } else { axes.first() };
    let own = match kind {
        "gamma" => vec![],
        _ => with(&ours, ".bias", &Axes::first, None),
    };
    vec![
        Rule { theirs: with(&theirs, weight, &all, None), ours: with(&ours, gain, &all, None), copies },
        Rule { theirs: with(&theirs, bias, &beside, Some(&group)), ours: own, copies },
    ]
}

type Sides = (Vec<Side>, Vec<Side>, bool);

fn sides(text: &str) -> Result<Sides, String> {
    let (theirs, ours) = text.split_once(" = ").ok_or("no =")?;
    let copies = ours.contains(" & ");
    let read = |text: &str| text.replace(" & ", " + ").split(" + ").map(side).collect::<Result<Vec<_>, _>>();
    let (theirs, mut ours) = (read(theirs)?, read(ours)?);
    let given = theirs[0].axes.clone();
    for side in &mut ours {
        if side.axes.0.is_empty() {
            side.axes = given.clone();
        }
    }
    // Nothing to take apart.
    if let ([theirs], [ours]) = (&theirs[..], &ours[..])
        && theirs.axes == ours.axes
    {
        return Ok((vec![theirs.clone()], vec![ours.clone()], copies));
    }
    let (single, many) = if theirs.len() == 1 { (&theirs, &ours) } else { (&ours, &theirs) };
    let parts = single[0].axes.sum().map_or(1, |(_, parts)| parts);
    if single.len() != 1 || (!copies && parts != many.len()) || many.iter().any(|m| m.axes.sum().is_some()) {
        return Err("the sides do not fit together".into());
    }
    Ok((theirs, ours, copies))
}

fn side(text: &str) -> Result<Side, String> {
    let (name, axes) = match text.split_once('[') {
        None => (text.trim(), Axes::default()),
        Some((name, axes)) => {
            let axes = axes.trim_end().strip_suffix(']').and_then(Axes::parse);
            (name.trim(), axes.ok_or_else(|| format!("{text}: no such axes"))?)
        }
    };
    let (pattern, group) = match name.split_once('?') {
        None => (name, None),
        Some((name, "")) => (name, Some(name.to_owned())),
        Some((name, word)) => (name, Some(word.to_owned())),
    };
    match pattern.contains(' ') || pattern.is_empty() {
        true => Err(format!("{text}: no such name")),
        false => Ok(Side { pattern: pattern.into(), axes, group }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_tables_can_be_read() {
        let families = families().unwrap();
        assert_eq!(families.len(), TABLES.iter().filter(|(key, _)| !key.starts_with("part-")).count());
        for family in families {
            assert!(family.rules.len() > 10, "{}", family.key);
            for rule in &family.rules {
                // Layers are numbered on both sides or on none.
                let numbered: Vec<_> =
                    rule.theirs.iter().chain(&rule.ours).map(|side| side.pattern.contains("{n}")).collect();
                assert!(numbered.windows(2).all(|pair| pair[0] == pair[1]), "{rule:?}");
            }
        }
    }

    #[test]
    fn names() {
        assert_eq!(matches("blocks.{n}.norm1.bias", "blocks.12.norm1.bias"), Some(Some(12)));
        assert_eq!(matches("blocks.{n}.norm1.bias", "blocks.012.norm1.bias"), None);
        assert_eq!(matches("blocks.{n}.norm1.bias", "blocks..norm1.bias"), None);
        assert_eq!(matches("norm.bias", "norm.bias"), Some(None));
        assert_eq!(matches("text_model.*", "text_model.a.b"), Some(None));
        assert_eq!(matches("blocks.{n}.mlp.w12.*", "blocks.3.mlp.w12.bias"), Some(Some(3)));
        assert_eq!(fill("blocks.{n}.a", Some(3)), "blocks.3.a");
    }

    #[test]
    fn mistakes_are_told() {
        let mut family = Family::default();
        for line in ["alone", "a [d]", "a [w] = b", "a [d] = b [d] + c [d]", "include nothing", "refuse a"] {
            assert!(add_line(&mut family, line).is_err(), "{line}");
        }
    }
}
