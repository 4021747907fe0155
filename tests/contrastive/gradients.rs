//! The loss in a graph whose backward pass starts from activations and parameters, against finite differences in f64.

use std::collections::HashMap;

use trencadis::autograd::contrastive::contrastive;
use trencadis::autograd::graph::{Extent, Graph, Tensor};
use trencadis::autograd::{CpuExecutor, Plan, StepState, gemm};
use trencadis::recipe::ContrastiveKind::{self, Sigmoid, Softmax};

use crate::support::{batch, param, random};

const PAIRS: usize = 6;

struct Net {
    graph: Graph,
    per_pair: Tensor,
}

/// Two towers of one linear layer each, which share the scale with nobody.
fn net(kind: ContrastiveKind, extent: Extent, backward: bool) -> Net {
    let mut graph = Graph::new();
    let g = &mut graph;
    let (pixels, tokens) = (g.input("pixels", PAIRS + 2, 5, extent), g.input("tokens", PAIRS + 2, 3, extent));
    let (of_images, of_texts) = (param(g, "images", &[4, 5]), param(g, "texts", &[4, 3]));
    let scale = param(g, "scale", &[1]);
    let bias = (kind == Sigmoid).then(|| param(g, "bias", &[1]));
    let (images, texts) = (gemm::linear(g, pixels, of_images, None), gemm::linear(g, tokens, of_texts, None));
    let loss = contrastive(g, images, texts, scale, bias, kind);
    if backward {
        let mut roots = vec![(images, loss.dimages), (texts, loss.dtexts), (scale, loss.dscale)];
        roots.extend(bias.zip(loss.dbias));
        g.backward(&roots);
    }
    graph.keep(loss.per_pair);
    Net { graph, per_pair: loss.per_pair }
}

#[test]
fn gradients_are_finite_differences() {
    for kind in [Softmax, Sigmoid] {
        let Net { graph, per_pair } = net(kind, Extent::Images, true);
        let feeds: HashMap<Tensor, Vec<f64>> = (0..2)
            .map(|i| {
                let input = Tensor::clone(&graph.nodes()[i].input(0));
                (input, random(graph.info(input).len(), 40 + i as u64))
            })
            .collect();
        let mut b = batch(&[[1, 1]; PAIRS], 0, 3, 2, 0, 2);
        b.weights[1] = 0.0;
        b.weights[4] = 0.5;
        let step = StepState { seed: 0, loss_scale: 0.2 };
        let mut params: Vec<Vec<f64>> =
            graph.params().iter().enumerate().map(|(i, p)| random(p.len(), i as u64)).collect();
        let mut grads: Vec<Vec<f64>> = params.iter().map(|p| vec![0.0; p.len()]).collect();
        let mut executor = CpuExecutor::<f64>::new();
        let plan = Plan::new(&graph);
        executor.run(&graph, &plan, &params, &mut grads, &feeds, &b, &step);
        assert!(executor.value(per_pair)[PAIRS..].iter().all(|x| *x == 0.0));
        assert_eq!(executor.value(per_pair)[1], 0.0);
        // A second batch is added.
        let once = grads.clone();
        executor.run(&graph, &plan, &params, &mut grads, &feeds, &b, &step);
        for (once, twice) in once.iter().flatten().zip(grads.iter().flatten()) {
            assert!((2.0 * once - twice).abs() < 1e-12);
        }

        let forward = net(kind, Extent::Images, false);
        let plan = Plan::new(&forward.graph);
        let mut objective = |params: &[Vec<f64>]| -> f64 {
            executor.run(&forward.graph, &plan, params, &mut [], &feeds, &b, &step);
            step.loss_scale * executor.value(forward.per_pair).iter().sum::<f64>()
        };
        let h = 1e-5;
        for p in 0..params.len() {
            for i in 0..params[p].len() {
                let x = params[p][i];
                params[p][i] = x + h;
                let above = objective(&params);
                params[p][i] = x - h;
                let below = objective(&params);
                params[p][i] = x;
                let (numeric, rule) = ((above - below) / (2.0 * h), once[p][i]);
                let name = &graph.params()[p].name;
                assert!((numeric - rule).abs() < 1e-8, "{kind:?}: d/d {name}[{i}]: {numeric}, rule {rule}");
                assert!(numeric.abs() > 1e-6, "{name}[{i}] does not matter, the check would prove nothing");
            }
        }
    }
}

#[test]
#[should_panic(expected = "a bias cancels in a softmax")]
fn a_softmax_has_no_bias() {
    let mut graph = Graph::new();
    let g = &mut graph;
    let (x, scale, bias) = (param(g, "x", &[2, 3]), param(g, "scale", &[1]), param(g, "bias", &[1]));
    contrastive(g, x, x, scale, Some(bias), Softmax);
}
