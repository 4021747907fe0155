//! Steps one after another, with the optimiser.

use trencadis::autograd::DeviceExecutor;
use trencadis::autograd::device::BatchShape;
use trencadis::autograd::graph::ParamSpec;
use trencadis::kernels::optim::{self, OptimizerState, OptimizerStep};
use trencadis::recipe::*;
use trencadis::train::optimizer::Optimizer;

use crate::case::*;
use crate::support::batch;
use crate::support::devices::devices;
use crate::support::numbers::distance;

/// Several steps with the optimiser on the executor's arenas, each one replay of a captured graph, follow the CPU.
#[test]
fn replayed_training_steps_follow_the_cpu() {
    const STEPS: usize = 3;
    const RATE: f64 = 0.01;
    let config = &variants()[0].1;
    let mut batches = [&GRIDS[..3], &GRIDS[1..4], &GRIDS[2..]]
        .map(|grids| batch(grids, 0, config.patch_dim(), CLASSES, TOKENS, 5 - grids.len()));
    batches[1].weights[1] = 0.5;
    let mut recorded = record(config, &batches[0], LossKind::Softmax);
    let train = TrainConfig { weight_decay: 0.1, clip: 1.0, ..TrainConfig::default() };
    let mut optimizer = Optimizer::new(recorded.graph.params(), &train);
    let begin = recorded.params.clone();
    let mut losses = Vec::new();
    for batch in &batches {
        let (loss, _, grads) = on_cpu(&recorded, batch);
        losses.push(loss);
        let grads: Vec<Vec<f32>> = grads.iter().map(|grad| narrow(grad)).collect();
        optimizer.step(RATE, &mut recorded.params, &grads).unwrap();
    }

    let decay = |param: &ParamSpec| if param.decay { train.weight_decay } else { 0.0 };
    let shape = BatchShape { longest: 9, ..BatchShape::of(&batches[0]) };
    for device in devices() {
        let mut executor = DeviceExecutor::new(&device, &recorded.graph, shape, &decay).unwrap();
        executor.write_params(&begin).unwrap();
        let arena = executor.params().arena().clone();
        let tables = arena.upload(&device).unwrap();
        let zeros = || device.zeros::<f32>(arena.len()).unwrap();
        let (m, v) = (zeros(), zeros());
        let step = OptimizerStep {
            lr: RATE,
            beta1: train.beta1,
            beta2: train.beta2,
            eps: train.eps,
            clip: train.clip,
            ..OptimizerStep::default()
        };
        let (step, state) = (device.upload(&[step]).unwrap(), device.zeros::<OptimizerState>(1).unwrap());
        let workspace = device.alloc::<u8>(optim::workspace_bytes(&arena, &device)).unwrap();
        let whole_step = |executor: &DeviceExecutor| {
            executor.zero_grads().unwrap();
            executor.launch().unwrap();
            let operands = optim::Operands {
                arena: &arena,
                tables: &tables,
                params: executor.master(),
                grads: executor.grads(),
                m: &m,
                v: &v,
                weights: Some(executor.weights()),
                average: None,
                step: &step,
                state: &state,
                stochastic: false,
                workspace: &workspace,
            };
            operands.adamw(executor.stream()).unwrap();
        };
        executor.stream().begin_capture().unwrap();
        whole_step(&executor);
        let graph = executor.stream().end_capture().unwrap();
        for (batch, loss) in batches.iter().zip(&losses) {
            executor.write_batch(batch, &STEP).unwrap();
            graph.launch(executor.stream()).unwrap();
            let got: Vec<f64> =
                executor.value(recorded.per_image).unwrap().iter().map(|&x| f64::from(x)).collect();
            assert!(distance(&got, loss) < 1e-3);
        }
        executor.check().unwrap();
        let state = state.download().unwrap()[0];
        assert_eq!((state.step, state.skipped), (STEPS as u64, 0));
        let wide = |x: &[f32]| -> Vec<f64> { x.iter().map(|&x| f64::from(x)).collect() };
        let trained = executor.read_params().unwrap();
        for ((param, got), want) in recorded.graph.params().iter().zip(&trained).zip(&recorded.params) {
            let apart = distance(&wide(got), &wide(want));
            assert!(apart < 1e-3, "{} is {apart:.1e} apart", param.name);
        }
        // What pads the weights is still zero.
        let all = executor.master().download().unwrap();
        assert!(executor.params().pack(&trained).unwrap() == all);
    }
}
