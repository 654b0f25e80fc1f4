package ai.onnxruntime;

/** The real class, without its enum of codes. */
public class OrtException extends Exception {
    public OrtException(String message) {
        super(message);
    }

    /** Called from native code; the real class names the code. */
    public OrtException(int code, String message) {
        super("Error code - " + code + " - message: " + message);
    }
}
