package ai.onnxruntime;

import java.util.Arrays;
import java.util.Iterator;
import java.util.LinkedHashMap;
import java.util.LinkedHashSet;
import java.util.Map;
import java.util.Set;

public class OrtSession implements AutoCloseable {
    private final long nativeHandle;
    private final Set<String> inputNames;
    private final Set<String> outputNames;
    private boolean closed = false;

    OrtSession(OrtEnvironment env, String modelPath, SessionOptions options) throws OrtException {
        nativeHandle = Native.createSession(env.nativeHandle, modelPath, options.nativeHandle());
        inputNames = new LinkedHashSet<>(Arrays.asList(Native.names(nativeHandle, false)));
        outputNames = new LinkedHashSet<>(Arrays.asList(Native.names(nativeHandle, true)));
        Native.count(1);
    }

    /** As in the real class, names must exist, no output may be both requested and pinned, and pinned ones come first. */
    public Result run(
            Map<String, ? extends OnnxTensorLike> inputs,
            Set<String> requestedOutputs,
            Map<String, ? extends OnnxValue> pinnedOutputs)
            throws OrtException {
        if (closed) throw new IllegalStateException("Trying to score a closed OrtSession.");
        if ((inputs.isEmpty() && !inputNames.isEmpty()) || inputs.size() > inputNames.size()) {
            throw new OrtException("Unexpected number of inputs, expected [1," + inputNames.size() + ") found "
                    + inputs.size());
        }
        int count = requestedOutputs.size() + pinnedOutputs.size();
        if (count == 0 || count > outputNames.size()) {
            throw new OrtException("Unexpected number of requestedOutputs & pinnedOutputs, expected [1,"
                    + outputNames.size() + ") found " + count);
        }
        String[] names = new String[inputs.size()];
        long[] handles = new long[inputs.size()];
        int i = 0;
        for (Map.Entry<String, ? extends OnnxTensorLike> input : inputs.entrySet()) {
            if (!inputNames.contains(input.getKey())) {
                throw new OrtException("Unknown input name " + input.getKey() + ", expected one of " + inputNames);
            }
            names[i] = input.getKey();
            handles[i++] = input.getValue().getNativeHandle();
        }
        String[] outputNamesInOrder = new String[count];
        OnnxValue[] values = new OnnxValue[count];
        long[] outputs = new long[count]; // 0: ONNX Runtime allocates it
        i = 0;
        for (Map.Entry<String, ? extends OnnxValue> output : pinnedOutputs.entrySet()) {
            if (!outputNames.contains(output.getKey())) {
                throw new OrtException("Unknown output name " + output.getKey() + ", expected one of " + outputNames);
            }
            outputNamesInOrder[i] = output.getKey();
            values[i] = output.getValue();
            outputs[i++] = ((OnnxTensorLike) output.getValue()).getNativeHandle();
        }
        for (String name : requestedOutputs) {
            if (!outputNames.contains(name)) {
                throw new OrtException("Unknown output name " + name + ", expected one of " + outputNames);
            }
            if (pinnedOutputs.containsKey(name)) {
                throw new OrtException("Output '" + name
                        + "' was found in both the requested outputs and the pinned outputs");
            }
            outputNamesInOrder[i++] = name;
        }
        Native.run(nativeHandle, names, handles, outputNamesInOrder, outputs);
        for (i = pinnedOutputs.size(); i < count; i++) {
            long[] info = Native.tensorInfo(outputs[i]);
            TensorInfo shape = new TensorInfo(Arrays.copyOfRange(info, 1, info.length));
            values[i] = new OnnxTensor(outputs[i], (int) info[0], shape, null);
        }
        return new Result(outputNamesInOrder, values, pinnedOutputs.size());
    }

    @Override
    public void close() throws OrtException {
        if (closed) throw new IllegalStateException("Trying to close an already closed OrtSession.");
        Native.closeSession(nativeHandle);
        closed = true;
        Native.count(-1);
    }

    public static class SessionOptions implements AutoCloseable {
        private final long nativeHandle;
        private boolean closed = false;

        public SessionOptions() {
            nativeHandle = Native.createOptions();
            Native.count(1);
        }

        public void setIntraOpNumThreads(int numThreads) throws OrtException {
            Native.setIntraOpNumThreads(nativeHandle(), numThreads);
        }

        public void setSessionLogLevel(OrtLoggingLevel logLevel) throws OrtException {
            Native.setSessionLogLevel(nativeHandle(), logLevel.getValue());
        }

        public void addConfigEntry(String configKey, String configValue) throws OrtException {
            Native.addConfigEntry(nativeHandle(), configKey, configValue);
        }

        long nativeHandle() {
            if (closed) throw new IllegalStateException("Trying to use a closed SessionOptions");
            return nativeHandle;
        }

        @Override
        public void close() {
            if (closed) throw new IllegalStateException("Trying to close a closed SessionOptions.");
            Native.closeOptions(nativeHandle);
            closed = true;
            Native.count(-1);
        }
    }

    /** Outputs of a run. Closing it closes those that ONNX Runtime allocated, not the pinned ones. */
    public static class Result implements AutoCloseable, Iterable<Map.Entry<String, OnnxValue>> {
        private final Map<String, OnnxValue> map = new LinkedHashMap<>();
        private final OnnxValue[] values;
        private final int pinned;
        private boolean closed = false;

        Result(String[] names, OnnxValue[] values, int pinned) {
            for (int i = 0; i < names.length; i++) map.put(names[i], values[i]);
            this.values = values;
            this.pinned = pinned;
        }

        @Override
        public Iterator<Map.Entry<String, OnnxValue>> iterator() {
            if (closed) throw new IllegalStateException("Result is closed");
            return map.entrySet().iterator();
        }

        @Override
        public void close() {
            if (closed) throw new IllegalStateException("stand-in: closed twice; the real class logs a warning");
            closed = true;
            for (int i = pinned; i < values.length; i++) values[i].close();
        }
    }
}
