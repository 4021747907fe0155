//! The record as text.

use std::fmt::Write as _;

use super::{Extent, Graph, Kind, Modality, Tensor};

impl Graph {
    /// The record as text, one node a line.
    pub fn render(&self) -> String {
        let mut text = String::new();
        let show = |t: &Option<Tensor>| match t {
            Some(t) => format!("%{} {}", t.0, self.info(*t).name),
            None => "-".into(),
        };
        for node in &self.nodes {
            let inputs: Vec<_> = node.inputs.iter().map(show).collect();
            for (i, output) in node.outputs.iter().enumerate() {
                let Some(output) = output else { continue };
                let info = self.info(*output);
                let extent = match info.extent {
                    Extent::Fixed => "",
                    Extent::Tokens if info.modality == Modality::Texts => "text T=",
                    Extent::Tokens => "T=",
                    Extent::Images => "N=",
                    Extent::Shard(_) => "t=",
                };
                let plus = if matches!(info.kind, Kind::Gradient(_)) { "+=" } else { "=" };
                let call =
                    if i == 0 { format!("{}({})", node.op.name(), inputs.join(", ")) } else { "〃".into() };
                let _ =
                    writeln!(text, "%{:<5}[{extent}{}, {}] {plus} {call}", output.0, info.rows, info.cols);
            }
        }
        text
    }
}
