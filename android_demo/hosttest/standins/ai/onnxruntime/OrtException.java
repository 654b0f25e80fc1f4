package ai.onnxruntime;

/** As the real one, without its enum of codes. */
public class OrtException extends Exception {
    public OrtException(String message) {
        super(message);
    }

    /** Called from native code; the real class gives the code's name. */
    public OrtException(int code, String message) {
        super("Error code - " + code + " - message: " + message);
    }
}
